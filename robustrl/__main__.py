"""`python -m robustrl` is the command `robustrl`."""

from robustrl.cli import main

if __name__ == "__main__":
    main()

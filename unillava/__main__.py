"""`python -m unillava` is the same as `unillava`."""

from unillava.cli.app import main

if __name__ == "__main__":
    main()

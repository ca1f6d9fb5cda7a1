"""`python -m kvasir`: the command line."""

from kvasir.cli.main import main

if __name__ == "__main__":
    main()

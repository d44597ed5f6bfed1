"""`python -m hwprune`: the command, where its script is not on the path."""

from hwprune.cli import main

if __name__ == "__main__":
    main()

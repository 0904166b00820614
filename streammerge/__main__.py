"""Lets ``python -m streammerge`` run the command line."""

from streammerge.cli import main

if __name__ == "__main__":
    main()

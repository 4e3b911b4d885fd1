"""`python -m sana_sprint` is the `sana-sprint` command."""

from sana_sprint.cli import main

if __name__ == "__main__":
    main()

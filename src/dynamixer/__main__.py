"""`python -m dynamixer` is the command `dynamixer`."""

from dynamixer.cli import main

main()

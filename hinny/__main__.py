"""`python -m hinny` is the command line."""

from hinny.cli import main

main()

"""`python -m service VERB`."""

from service.cli import main

main()

"""`python -m service VERB`."""

from service.cli.main import main

main()

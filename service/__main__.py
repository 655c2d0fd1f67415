"""`python -m service VERB`."""

from service.cli.main import main, open_standard_streams

open_standard_streams()
main()

"""`python -m service VERB`."""

from service.base.text import prepare_streams

prepare_streams()

from service.cli.main import main  # noqa: E402  the log keeps standard error as it finds it

main()

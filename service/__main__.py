"""`python -m service VERB`."""

import gc

gc.disable()  # modules are no garbage: looking through them again and again takes a fifth of the time to load them

from service.base.text import prepare_streams  # noqa: E402

prepare_streams()

from service.cli.main import main  # noqa: E402  the log keeps standard error as it finds it

gc.freeze()
gc.enable()
main()

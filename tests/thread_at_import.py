"""A module that has a thread once it is imported: nothing can be forked after it."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()

"""Functions in processes of their own that start at once: forked from a server that did the imports.

Neither it nor the test process has to be forked with threads running.
"""

import multiprocessing


SERVER = multiprocessing.get_context("forkserver")
# There is one server, which cannot be given more once it runs.
SERVER.set_forkserver_preload(
    [
        "upcycled_moe.common.text",
        "upcycled_moe.conversion.convert",
        "upcycled_moe.train.model",
        "upcycled_moe.train.train",
        "upcycled_moe.train.trainer",
    ]
)

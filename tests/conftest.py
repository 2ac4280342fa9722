"""For every test: one thread a process, set before torch or a tokenizer is imported anywhere.

The models of the tests are so small that a second thread only waits for the first, and on a busy machine waits long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

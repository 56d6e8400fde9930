"""The plumbing around `cdp`: the only owner of paths, processes and time."""

import os

# The allocator that Arrow brings reserves a GiB at once, which a memory limit would have to count,
# and at the limit its threads wait for each other without end. Read once, when Arrow is loaded.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

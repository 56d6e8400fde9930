"""The pipeline around `cdp`: stages, files, processes and commands.

- `run`, `review`, `export`: the commands, each `python -m pipelines.<name>`.
- `config`, `yaml_files`: settings of a run. `data`: data manifests and data sets.
- `stage`: what a stage is, when it runs. `stages`: one file a stage, and their order.
- `store`: published stages and locks. `files`, `tables`: atomic files, Parquet. `engine`: Dask.
- `members`, `training`: committee models on disk; training jobs of the stages.
- `decisions`, `review_session`: reviewers' decisions. `results`: a finished run as DataFrames.
- `pages`: the report and the review page.
"""

import os

from cdp.numba_cache import choose_font_folder

choose_font_folder()

# Arrow's own allocator reserves a GiB at once, which counts against a memory limit, and at the
# limit its threads deadlock. The variable is read once, when Arrow is loaded.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

"""The plumbing around `cdp`: the only owner of paths, processes and time."""

"""The library beside what its users would write or take instead: `make bench`.

To be read in this order: `shapes` (what a search does to a cache), `contestants/` (where nodes are kept, and how),
`cases/` (what is measured), `measuring` (clocks and quartiles), `worker` and `crew` (a process for each contestant),
`rounds` (turns), `summary` (what is recorded), `tables`, `plots` and `markdown` (how it is shown), `__main__`.
"""

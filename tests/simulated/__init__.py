"""A GPU that is none: streams are queues whose copies run late, at any point and in any order that streams, events and
waits allow. Memory is real tensors, full of garbage when it is allocated and when it is freed.

    queues.py    streams, events, and what may run next
    memory.py    allocations, and what happens to memory that nobody names any more
    gpu.py       the operators: what is enqueued, what is done at once, what waits
    backend.py   the clock's `StreamBackend` over it
    world.py     pools on such a device under the explorer's scheduler, and what their callers saw
    programs.py  what several host threads do at once (acts.py, batch_acts.py); random_programs.py makes more up
    search_world.py  searches on such a device; random_searches.py makes programs of them up
    faults.py    waits, ticks and protections left out on purpose (sites.py), and the program that notices each

Not modelled: the implicit order of CUDA's legacy default stream, memory that several processes share, graphs (a stream
only says that it is being captured). Host threads take turns at locks and at calls of the backend, as in the explorer.
"""

"""A stateless model checker for the pool: real operations as greenlets, every interleaving of their steps.

In the manner of CHESS (Musuvathi and Qadeer): an execution is a sequence of choices of who takes the next step; a
depth-first search re-executes a program for every such sequence with at most so many preemptions (a preemption takes
the processor from a task that could have gone on).

What is replaced are injected parts only: the mutex, the shards' reader-writer locks, the waiters' events and the slot
tensor. Everything else is the library's own code. A step begins at every lock acquired, every shard let go, every wait
and wake-up, and in the middle of every copy.

A failure prints its schedule, one letter for each step; `search.replay(program, schedule)` runs it again.

What the model does not cover: switches between two statements with no such step in between (a data race on plain
attributes inside one step), memory reordering, streams, and asynchronous exceptions. Time is a model too: a wait with
a deadline expires only when nobody can take a step.
"""

"""Moving KV blocks between pools: the verbs, the pure hand-off machine and planner, and one file a backend.

Here belongs everything between "these blocks are offered" and "these bytes are verified in my pool". What does not:
which worker offers to whom (router), and what is computed from the blocks (engine).

    endpoint    what a worker's event loop uses: offers, pulls, words to the source       pulls, peers   its two halves
    transport   the verbs of a backend           local, shm, tcp   backends               faulty         faults around any of them
    region      a pool's memory, generations     copying   the seqlock                    digest         content checks
    lanes       threads, queues, deadlines       session   authenticated sockets          auto           which path, and why
    handoff     who owns an offer, pure          reshard   which bytes go where, pure     config         bounds and policy
"""

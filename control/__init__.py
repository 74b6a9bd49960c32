"""What is decided for the cluster as a whole, before and beside serving: configuration, composition, supervision. Pure.

    config.py, sections.py, flags.py    the one door for files, flags and environment; the schema; the flags
    binding.py, yaml_file.py            plain values to frozen records, with errors that say where and what instead
    compose.py, memory.py               from configuration and checkpoint to the plan and the core of a worker
    supervisor.py                       which workers are started, replaced, drained and stopped
    startup.py, run_files.py            what a start reports; how a running server is found

What does not belong here: anything that acts (cluster, simulator), and the settings one room alone reads (they stand there).
"""

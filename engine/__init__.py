"""What both kinds of worker share: scheduling, blocks, models and the executors that run them.

    core/           pure: one scheduler, block pool, prefix cache, the worker's state machine
    models/         architectures as one declarative table; config.json; torch-free but for the model itself
    layers/, runner/   torch: the forward pass and what drives it
    paced.py, step_time.py, tokenizer.py, hub.py, demo.py   a made-up pace, models of time, text, checkpoints
    hardware.py, roofline.py, published_steps.py   step times and KV room of GPUs that are not there

What does not belong here: which request runs where (router), and what a worker prefers (prefill_workers, decode_workers).
"""

"""What a merge costs, measured against `cp -r` and PEFT on synthetic checkpoints: `python -m tests.bench`."""

"""The whole road on a task that any machine can make: pretraining, fine-tuning, a reward model, PPO, a report.

The task is :mod:`gptcore.align.tasks.arithmetic`: demonstrations by somebody who is unsure when to carry, and rankings
by somebody who knows better and is sometimes confused. What imitation copies, learning from rankings is to mend.
"""

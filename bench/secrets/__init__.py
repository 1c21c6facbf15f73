"""A study of keeping a secret: constitutional AI, AI feedback and red-teaming, from one small model to a report.

The task is :mod:`gptcore.align.tasks.secrets`. One model is trained that answers questions, gives its key to nearly
everybody who asks, and can criticise, revise and judge answers by written principles. It is then mended in two ways,
by its own critiques and revisions and by PPO on its own judgements, and attacked in ways and words never trained on.
"""

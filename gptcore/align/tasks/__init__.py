"""Tasks whose data is made on any machine and whose answers a rule can judge, to align and to measure with.

- :mod:`~gptcore.align.tasks.arithmetic`: additions with the working shown; exact match.
- :mod:`~gptcore.align.tasks.random_walks`: shortest paths in a graph; optimality.
- :mod:`~gptcore.align.tasks.docstrings`: what a function of this Python does, in a line; the rules of PEP 257.
- :mod:`~gptcore.align.tasks.secrets`: a key that is not to be told, benign questions beside; leaks and right answers.

Everything is a pure function of its arguments, the seed among them. A reward takes a task
(:class:`gptcore.data.records.Task`) and a completion and gives a number.
"""

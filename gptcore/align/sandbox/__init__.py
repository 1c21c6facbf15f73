"""The far side of :mod:`gptcore.align.verifier`: the process that confines and runs code that nobody has read.

Standard library only, since every check is a fork of this process: small processes fork fast.
"""

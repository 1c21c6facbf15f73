"""The command line: ``gptcore VERB``. One file per verb, loaded when it is called."""

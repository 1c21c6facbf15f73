"""gptcore under other libraries' programs; nothing here is imported, or changes anything, until it is asked for."""

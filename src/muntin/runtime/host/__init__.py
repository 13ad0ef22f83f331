"""The machine under a process: hardware, memory, signals, helper processes, and the quiet import of engines."""

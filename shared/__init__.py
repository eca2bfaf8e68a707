"""The language that both sides of Outrider speak: values, errors, limits, wire messages, trust rules.

Nothing here does I/O, reads a clock, draws a random number or logs; whoever needs those passes them in.
"""

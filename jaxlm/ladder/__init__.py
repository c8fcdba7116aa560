"""The ladder: from one neuron to the transformer, each rung written by hand.

Every rung is one file that reads from top to bottom and runs alone:
`python -m jaxlm.ladder.perceptron`. Its docstring says what it could not do,
which is the reason for the next one. The rungs import nothing of the library
but what declares a parameter, and nothing imports them.
"""

"""What float32 may move a result by: the tolerances of tests that compare float32 with something.

One operation is off by at most UNIT of its result. A sum of n terms is off by at most n UNIT of the sum of their absolute
values, in whatever order a processor adds them (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and so
is a chain of n operations on numbers of one size. Vectors of any width and fused multiply-adds stay within that; a number
measured on one processor need not hold on the next.
"""

UNIT = 2.0**-24


def rounding(operations: int, magnitude=1.0):
    """What a chain of float32 operations, or a sum of as many terms, may be off by. Two float32 results: twice that."""
    return operations * UNIT * magnitude

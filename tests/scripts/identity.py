"""Prints what a script can see of how it is run."""

import inspect
import pickle
import sys


class Local:
    pass


main = sys.modules["__main__"]
print(__name__, main.__dict__ is globals(), main.__file__ == __file__, main.__spec__ and main.__spec__.name)
print(__package__, sys.argv, sys.path[0])
print(type(pickle.loads(pickle.dumps(Local()))) is Local, inspect.getsource(Local))

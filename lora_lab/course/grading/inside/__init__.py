"""What runs in the jail. These files import the standard library alone at their top (IPython, torch and the runner later), so that they
can be loaded from outside before the doors close; the jail itself holds none of them.
"""

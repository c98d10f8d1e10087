"""Callbacks for trainers of other packages; each file needs the package that it is named after."""

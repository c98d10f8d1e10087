"""Callbacks for the trainers that people use; each file needs the package that it is named after."""

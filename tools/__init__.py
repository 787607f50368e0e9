"""Tools of the repository: set-up, checks, execution of the notebooks and the site. Not part of the package."""

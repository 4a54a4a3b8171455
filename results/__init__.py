"""Numbers that print, export and come back: records, tables in text and HTML, files, standard errors."""

__all__: list[str] = []

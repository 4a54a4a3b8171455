"""Results that can be printed, exported and read again: records, tables, files, standard errors."""

from .records import Measurement, Quantity, Record
from .standard_errors import mc_error, standard_error_of_mean
from .tables import Printed, Table

__all__ = ["Measurement", "Printed", "Quantity", "Record", "Table", "mc_error", "standard_error_of_mean"]

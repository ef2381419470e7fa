//! Finds the dumps of real machines that the lab scripts make. Grows with the first test that reads them.

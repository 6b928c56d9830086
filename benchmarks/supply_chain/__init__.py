"""The libraries that this package is built from: their bill of materials, licences, advisories."""

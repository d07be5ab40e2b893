"""What several test files share."""

from helpers import shape_checks as shape_checks

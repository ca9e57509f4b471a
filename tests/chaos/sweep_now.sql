-- Whatever is to be swept is due now, from the beginning, and nobody is at it.
UPDATE duties SET due_ms = 0, lease_until = 0, place = NULL;

-- Every resume point.
SELECT job || ' at step ' || step FROM resume_points;

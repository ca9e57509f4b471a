-- A job that ends its workers must not go through all of them: claims in a row, the present one
-- among them, in which no step was reported beyond the furthest one ever.
ALTER TABLE jobs ADD COLUMN fruitless_claims BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN furthest_step BIGINT NOT NULL DEFAULT 0;

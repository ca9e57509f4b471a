-- The name of every object that a row names.
SELECT 'files/' || id FROM files WHERE deleted_at IS NULL;
SELECT object || '/adapter_config.json' FROM adapters WHERE deleted_at IS NULL;
SELECT object || '/adapter_model.safetensors' FROM adapters WHERE deleted_at IS NULL;
SELECT 'resume-points/' || job || '/' || attempt || '-' || step FROM resume_points;

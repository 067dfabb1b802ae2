-- Since when a member has renewed its lease without a gap, so that the statement of a claim can ask for it.
alter table member add column steady_since timestamptz not null default clock_timestamp();

-- Leases that ended before their member left: a node that loses too many is given no slots for a while.
create table lost_lease (
  node text not null,
  incarnation uuid not null,
  -- When that lease was renewed last: with it several witnesses of one loss count it once.
  renewed_at timestamptz not null,
  lost_at timestamptz not null default clock_timestamp(),
  primary key (incarnation, renewed_at)
);
create index lost_lease_by_node on lost_lease (node, lost_at);

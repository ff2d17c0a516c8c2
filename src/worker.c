#include "postgres.h"

void abp_worker_init(void);
void abp_worker_init(void) {}

// A process whose first thread ends while another one goes on: it looks like a zombie and is none.
#include <pthread.h>
#include <unistd.h>

static void *go_on(void *unused)
{
    for (;;)
        sleep(1000);
    return unused;
}

int main(void)
{
    pthread_t other;
    if (pthread_create(&other, NULL, go_on, NULL))
        return 1;
    pthread_exit(NULL);
}
